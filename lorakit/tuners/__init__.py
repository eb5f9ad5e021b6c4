"""The two tuners. Importing one of their modules registers its type with PEFT; this package itself is light."""
