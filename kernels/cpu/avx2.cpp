#define ISA avx2
#include "schedule-inl.h"
