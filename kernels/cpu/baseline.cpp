#define ISA baseline
#include "schedule-inl.h"
