"""File or bytes in, views out: decoding, preprocessing, datasets, crops and batches."""
