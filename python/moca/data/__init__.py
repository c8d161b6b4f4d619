"""Data: records, sources, images, encoding, packing and batches."""
