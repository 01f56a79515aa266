// Runs random functions with random registers and prints what each leaves behind: registers, flags, vector state, memory, faults.
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
typedef uint64_t u64;
struct state { u64 general[16], flags; unsigned mxcsr, unused; __attribute__((aligned(16))) unsigned char vector[16][16]; } state;
unsigned char data[8192] __attribute__((aligned(4096)));
u64 run_stack, run_function;
// At the same place in each process: flags tell of addresses.
u64 own_stack = 0x700000100000;
extern void (*const functions[])(void);
extern const u64 function_count;
void run(void);
void run_done(void);
asm(".text\n.globl run\n.type run,@function\nrun:\n"
    "push %rbx\npush %rbp\npush %r12\npush %r13\npush %r14\npush %r15\nsub $8,%rsp\nmov %rsp,run_stack(%rip)\nmov own_stack(%rip),%rsp\n"
    "ldmxcsr state+136(%rip)\n"
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\nmovups state+144+16*\\n(%rip),%xmm\\n\n.endr\n"
    "push state+128(%rip)\npopfq\n"
    "mov state(%rip),%rax\nmov state+8(%rip),%rcx\nmov state+16(%rip),%rdx\nmov state+24(%rip),%rbx\nmov state+40(%rip),%rbp\n"
    "mov state+48(%rip),%rsi\nmov state+56(%rip),%rdi\nmov state+64(%rip),%r8\nmov state+72(%rip),%r9\nmov state+80(%rip),%r10\n"
    "mov state+88(%rip),%r11\nmov state+96(%rip),%r12\nmov state+104(%rip),%r13\nmov state+112(%rip),%r14\nmov state+120(%rip),%r15\n"
    "call *run_function(%rip)\n"
    "mov %rax,state(%rip)\nmov %rcx,state+8(%rip)\nmov %rdx,state+16(%rip)\nmov %rbx,state+24(%rip)\nmov %rsp,state+32(%rip)\n"
    "mov %rbp,state+40(%rip)\nmov %rsi,state+48(%rip)\nmov %rdi,state+56(%rip)\nmov %r8,state+64(%rip)\nmov %r9,state+72(%rip)\n"
    "mov %r10,state+80(%rip)\nmov %r11,state+88(%rip)\nmov %r12,state+96(%rip)\nmov %r13,state+104(%rip)\nmov %r14,state+112(%rip)\n"
    "mov %r15,state+120(%rip)\npushfq\npop state+128(%rip)\nstmxcsr state+136(%rip)\n"
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\nmovups %xmm\\n,state+144+16*\\n(%rip)\n.endr\n"
    ".globl run_done\nrun_done:\nmov run_stack(%rip),%rsp\ncld\nldmxcsr default_mxcsr(%rip)\nemms\nfninit\n"
    "add $8,%rsp\npop %r15\npop %r14\npop %r13\npop %r12\npop %rbp\npop %rbx\nret\n.size run,.-run\n"
    ".section .rodata\ndefault_mxcsr: .long 0x1f80\n.text\n");
static int fault;
static u64 fault_at;
static void on_fault(int number, siginfo_t *info, void *context) {
    gregset_t *g = &((ucontext_t *)context)->uc_mcontext.gregs;
    static const int order[16] = { REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10,
        REG_R11, REG_R12, REG_R13, REG_R14, REG_R15 };
    for (int i = 0; i < 16; i++) state.general[i] = (*g)[order[i]];
    state.flags = (*g)[REG_EFL];
    fault = number;
    fault_at = number == SIGSEGV ? (u64)info->si_addr : 0;
    memcpy(state.vector, ((ucontext_t *)context)->uc_mcontext.fpregs->_xmm, 256);
    (*g)[REG_RIP] = (u64)run_done;
}
static u64 seed;
static u64 next(void) {
    seed ^= seed >> 12;
    seed ^= seed << 25;
    seed ^= seed >> 27;
    return seed * 0x2545f4914f6cdd1dull;
}
static u64 hash(u64 h, const void *p, u64 n) {
    for (u64 i = 0; i < n; i++) h = (h ^ ((const unsigned char *)p)[i]) * 0x100000001b3ull;
    return h;
}
int main(int count, char **arguments) {
    seed = count > 1 ? strtoull(arguments[1], 0, 10) : 1;
    int rounds = count > 2 ? atoi(arguments[2]) : 4;
    struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK };
    static char alternate[65536];
    stack_t stack = { .ss_sp = alternate, .ss_size = sizeof alternate };
    sigaltstack(&stack, 0);
    sigaction(SIGSEGV, &action, 0);
    sigaction(SIGFPE, &action, 0);
    sigaction(SIGILL, &action, 0);
    sigaction(SIGTRAP, &action, 0);
    if (mmap((void *)0x700000000000, 0x200000, 3, 0x100022, -1, 0) == MAP_FAILED) return 96;
    u64 base = 0;
    for (u64 f = 0; f < function_count; f++)
        for (int round = 0; round < rounds; round++) {
            for (int i = 0; i < 16; i++) state.general[i] = next() >> (next() & 63);
            state.general[15] = (u64)data + 4096;
            state.flags = (next() & 0x8d5) | 0x202;
            state.mxcsr = 0x1f80 | (next() & 0x6000);
            for (int i = 0; i < 256; i++) ((unsigned char *)state.vector)[i] = next();
            for (unsigned i = 0; i < sizeof data; i++) data[i] = next();
            run_function = (u64)functions[f];
            fault = 0;
            fault_at = 0;
            if (getenv("ASAP_TEST_STOP")) asm volatile("int3");
            run();
            if (getenv("ASAP_TEST_STOP")) asm volatile("int3");
            if (!base) base = state.general[4];
            state.general[4] -= fault ? state.general[4] : base;
            state.flags &= 0xcd5;
            printf("%lu.%d fault %d %lx flags %lx mxcsr %x vector %lx memory %lx registers", f, round, fault, fault_at, state.flags,
                state.mxcsr, hash(2, state.vector, 256), hash(3, data, sizeof data));
            for (int i = 0; i < 16; i++) printf(" %lx", state.general[i]);
            printf("\n");
        }
}
