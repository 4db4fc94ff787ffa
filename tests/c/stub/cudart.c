/* cudart.c - a library with the name of CUDA's runtime and nothing in it: NVRTC is looked for where it lies */
int stub_cudart(void);
int stub_cudart(void) { return 12; }
