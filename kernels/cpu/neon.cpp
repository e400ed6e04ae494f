#define ISA neon
#define NEON  // also where the baseline unit could use it: that is how both are compared
#include "schedule-inl.h"
