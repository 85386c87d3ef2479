"""Decoders to and from the folders of Hugging Face's transformers library, which is not needed for it."""
