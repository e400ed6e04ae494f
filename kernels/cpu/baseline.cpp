#define ISA baseline
#include "angle_schedule-inl.h"
#include "distance-inl.h"
#include "schedule-inl.h"
