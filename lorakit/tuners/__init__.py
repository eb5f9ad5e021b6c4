"""The two tuners. Importing one of their modules registers its type with PEFT; this package itself is light."""

# Inits that change the base weight: the factors are an update of the changed weight, not of the original.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
