#define ISA avx2
#include "angle_schedule-inl.h"
#include "schedule-inl.h"
