#define ISA avx512
#include "angle_schedule-inl.h"
#include "distance-inl.h"
#include "schedule-inl.h"
