/* Target of the kernel tests: reads commands, one a line, and answers each with one line. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int hold[2];
static volatile int spinning = 1;

static long gettid_(void) { return syscall(SYS_gettid); }

/* Blocks in read(2), three frames deep, with known values on its stack and in registers that survive calls. */
__attribute__((noinline, noclone)) long blocked(long mark) {
    volatile long words[4] = {0x5eed0001, mark, 0x5eed0002, mark};
    char byte;
    register long kept __asm__("rbx") = 0x5eedb0b0;
    __asm__ volatile("" : "+r"(kept));
    long got = read(hold[0], &byte, 1);
    __asm__ volatile("" : "+r"(kept));
    return got + words[1] + kept;
}

static void *block(void *mark) {
    printf("%ld\n", gettid_());
    fflush(stdout);
    return (void *)blocked((long)mark);
}

static void *spin(void *unused) {
    printf("%ld\n", gettid_());
    fflush(stdout);
    while (spinning) {
    }
    return unused;
}

/* Called by the order "call". */
__attribute__((noinline, noclone)) long counted(long depth) {
    __asm__ volatile("" : "+r"(depth));
    if (depth > 1) {
        long below = counted(depth - 1);
        __asm__ volatile("" : "+r"(below));
        return below + 1;
    }
    return depth;
}

/* Stands in for `counted` when calls are redirected. */
__attribute__((noinline, noclone, used)) long doubled(long depth) {
    __asm__ volatile("" : "+r"(depth));
    return depth * 2;
}

int main(int argc, char **argv) {
    (void)argv;
    char line[256];
    pthread_t thread;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc > 1) /* What a child executes. */
        return 0;
    if (pipe(hold))
        return 1;
    while (fgets(line, sizeof line, stdin)) {
        long number = 0;
        char word[64] = "";
        sscanf(line, "%63s %li", word, &number);
        if (!strcmp(word, "block"))
            pthread_create(&thread, NULL, block, (void *)number);
        else if (!strcmp(word, "spin"))
            pthread_create(&thread, NULL, spin, NULL);
        else if (!strcmp(word, "rest")) {
            spinning = 0;
            printf("rested\n");
        } else if (!strcmp(word, "call"))
            printf("%ld\n", counted(number));
        else if (!strcmp(word, "fork")) {
            pid_t child = fork();
            if (!child) {
                if (number)
                    execl("/proc/self/exe", "fixture", "executed", NULL);
                _exit(0);
            }
            waitpid(child, NULL, 0);
            printf("%d\n", child);
        } else if (!strcmp(word, "grandchild")) {
            pid_t child = fork();
            if (!child) {
                pid_t grandchild = fork();
                if (!grandchild)
                    _exit(0);
                waitpid(grandchild, NULL, 0);
                _exit(0);
            }
            waitpid(child, NULL, 0);
            printf("%d\n", child);
        } else if (!strcmp(word, "end"))
            return 0;
    }
    return 0;
}
