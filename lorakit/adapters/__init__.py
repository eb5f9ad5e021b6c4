"""The view over adapters: the only code that knows key names, scaling and files."""
