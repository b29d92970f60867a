"""`make gpu-check`: builds, tests and measures the project on whatever GPU it finds.

    check       the program: starts the sections, writes down what each found
    section     one section in a process of its own
    machine     the GPU, and its two limits: a copy and a matrix product
    building    compiles the kernels
    testing     the tests that use a GPU, and the checkers of races and memory
    contests    every kernel beside a copy, PyTorch's operators and torch.compile
    training    this project's steps beside those of its peers
    agreement   several processes on the one GPU train what one does
    report      goals, and all of it as Markdown

`--smoke` runs all of it on a CPU at tiny sizes, with emulated kernels: every line but those that
only a GPU can take.
"""
