"""Operators that have more than one implementation, and the choice between them.

`kernels` says whether a CUDA kernel of `csrc/cuda/` takes a tensor, `build` compiles them,
`operator` registers a kernel with its twin, and the other modules are the operators by family.
"""
