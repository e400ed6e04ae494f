#define ISA avx2
#include "pairwise.inc"
