"""The heads: a module that defines ``build`` is one, named after its file (``fc8_conv.py``: fc8-conv)."""
