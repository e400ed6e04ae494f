#if defined(__aarch64__)  // a library for macOS may be compiled for x86-64 as well
#define ISA neon
#define NEON  // not asked of the compiler: the baseline unit does without it
#include "angle_schedule-inl.h"
#include "distance-inl.h"
#include "schedule-inl.h"
#endif
