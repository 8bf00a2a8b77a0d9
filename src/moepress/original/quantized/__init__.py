"""Originals that are published quantized, presented as if they were not.

    config      what config.json says of the quantization; which methods are refused, and why
    headers     dtype, shape and place of every tensor in the files
    pairing     which tensors of the files are codes, and which are their scales
    grids       which weights share a scale
    numbers     codes and scales as float32
    fitting     whether what lies beside codes fits them
    forms       read a tensor of the files, dequantized

`original/checkpoint.py` puts them together.
"""
