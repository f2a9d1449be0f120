"""Small networks trained on cached rows. They know tensors and keys, never files or backbones."""
