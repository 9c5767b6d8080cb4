"""What can be asked of a model, one file a task: images and text in, text (or numbers) out."""
