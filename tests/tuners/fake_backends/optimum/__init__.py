"""PEFT asks for this package before it takes gptqmodel's layers."""
