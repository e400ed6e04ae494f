#define ISA avx2
#include "angle_schedule-inl.h"
#include "distance-inl.h"
#include "schedule-inl.h"
