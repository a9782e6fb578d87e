"""PEFT's adapters on disk: configuration, keys and shapes, safetensors files, mapped both ways."""
