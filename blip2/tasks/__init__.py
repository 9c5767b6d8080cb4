"""The tasks of a model, one file each: images and text in, text (or numbers) out."""
