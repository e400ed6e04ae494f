// What a thread needs: standard floating-point arithmetic, and a way to wait for the others.
#pragma once
#include <unistd.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include "vector-inl.h"

namespace ISA {
namespace {

// The floating-point state of this thread as long as one of these lives: subnormal numbers are
// numbers, rounding is to nearest. A caller may have asked for the contrary, or a library of the
// process that was linked with -ffast-math; but the caller's state is its own thread's, and the
// result would then depend on which thread did what.
struct StandardArithmetic {
#if defined(__x86_64__)
    unsigned before = __builtin_ia32_stmxcsr();
    StandardArithmetic() { __builtin_ia32_ldmxcsr(0x1f80); }
    ~StandardArithmetic() { __builtin_ia32_ldmxcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;
    StandardArithmetic() {
        asm volatile("mrs %0, fpcr" : "=r"(before) : : "memory");
        asm volatile("msr fpcr, %0" : : "r"(uint64_t(0)) : "memory");
    }
    ~StandardArithmetic() { asm volatile("msr fpcr, %0" : : "r"(before) : "memory"); }
#endif
};

INLINE void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

// A count of the stages that something has been through, which threads wait for. Mostly the others
// are about to arrive, so a thread looks for a moment before it sleeps; but with more threads than
// free cores, looking takes the core of the one that is waited for.
struct Stage {
    int32_t count, sleepers;

    INLINE int now() const { return __atomic_load_n(&count, __ATOMIC_ACQUIRE); }

    void wait(int stage) {
        for (int looks = 0; looks < 500; looks++) {
            if (now() >= stage) return;
            pause();
        }
        __atomic_fetch_add(&sleepers, 1, __ATOMIC_SEQ_CST);
        for (int seen; (seen = now()) < stage;) sleep(seen);
        __atomic_fetch_sub(&sleepers, 1, __ATOMIC_SEQ_CST);
    }

    void advance(int stage) {
        __atomic_store_n(&count, stage + 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&sleepers, __ATOMIC_SEQ_CST)) wake();
    }

  private:
#if defined(__linux__)
    // returns at once where the count is no longer what was seen
    void sleep(int seen) { syscall(SYS_futex, &count, FUTEX_WAIT_PRIVATE, seen, nullptr); }
    void wake() { syscall(SYS_futex, &count, FUTEX_WAKE_PRIVATE, INT32_MAX); }
#else
    void sleep(int) { usleep(50); }
    void wake() {}
#endif
};

}  // namespace
}  // namespace ISA
