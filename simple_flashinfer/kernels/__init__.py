"""Small kernels beside torch's and those of attention: for the CPU in C++, written for this project; for CUDA FlashInfer's."""
