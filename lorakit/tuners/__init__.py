"""The two PEFT tuners. Importing `speclora` or `fisherlora` registers it with PEFT; this package imports neither."""
