"""The host executor: CUDA kernels compiled by the C++ compiler and run on the CPU under sanitizers."""
