#define ISA baseline
#include "pairwise.inc"
