// Target of the kernel tests: exceptions that unwind through functions which are probed.
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" {
__attribute__((noinline, noclone)) long thrower(long value) {
    if (value)
        throw value;
    return value;
}

__attribute__((noinline, noclone)) long between(long value) {
    long got = thrower(value);
    __asm__ volatile("" : "+r"(got));
    return got + 1;
}

__attribute__((noinline, noclone)) long catcher(long value) {
    try {
        return between(value);
    } catch (long caught) {
        return -caught;
    }
}
}

int main() {
    char line[256];
    setvbuf(stdout, nullptr, _IOLBF, 0);
    while (fgets(line, sizeof line, stdin)) {
        char *number = strchr(line, ' ');
        printf("%ld\n", catcher(number ? strtol(number, nullptr, 0) : 0));
    }
}
