"""The networks: one backbone per modality, decoders, and the loading of pretrained weights."""
