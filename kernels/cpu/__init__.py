"""The compiled kernel for processors, in C++, called through ctypes."""
