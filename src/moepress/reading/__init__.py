"""The border that everything from outside passes: files, JSON, safetensors headers, documents.

Whatever is read here was perhaps cut, edited or made by somebody else. It is refused with one
`FileError` or `InputError` of one line, before memory for it is asked for. The package imports
nothing of moepress but its errors.
"""
