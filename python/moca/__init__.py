"""The MoCa system: data, model, the two training stages, embedding and evaluation."""
