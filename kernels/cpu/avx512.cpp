#define ISA avx512
#include "pairwise.inc"
