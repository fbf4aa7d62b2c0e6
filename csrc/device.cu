// What Python asks CUDA's runtime besides launching: messages, and which device launches go to.
#include "launchers.h"

#include "common.cuh"

#ifdef FLOWMO_HOST_EXECUTOR
const char* error_text(int) { return "reported by the host executor"; }
int set_device(int64_t) { return 0; }
#else
const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
int set_device(int64_t index) { return static_cast<int>(cudaSetDevice(static_cast<int>(index))); }
#endif
