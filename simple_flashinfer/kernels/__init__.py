"""Small kernels beside torch's and those of attention: for the CPU in C++, made for this project; for CUDA FlashInfer's."""
