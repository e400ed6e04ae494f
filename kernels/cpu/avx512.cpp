#define ISA avx512
#include "schedule-inl.h"
