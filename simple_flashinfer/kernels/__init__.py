"""Small kernels beside what torch and FlashInfer bring, written for this project: for the CPU, in C++."""
