"""Drop-in integrations: each module registers moca_fast with one other library when imported."""
