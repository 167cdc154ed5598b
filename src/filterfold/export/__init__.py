"""A network as a file for other programs: one file a form, each checked in the program that will run it.

`program.py` writes `torch.export` programs and ONNX, `formats.py` the others and says which suffix means which,
`int8.py` ONNX in 8 bits. `onnx_network.py` runs an ONNX file as a module, `pixels.py` normalises inside a network.
"""
