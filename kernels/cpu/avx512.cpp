#define ISA avx512
#include "angle_schedule-inl.h"
#include "schedule-inl.h"
