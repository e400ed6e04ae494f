#define ISA baseline
#include "angle_schedule-inl.h"
#include "schedule-inl.h"
