/* asap-patch.h: for authors of patches that `asap patch` puts into running programs.
 *
 * A patch is an ordinary object file: C or C++, gcc or clang, any -O level.
 *
 *     cc -O2 -fPIC -c fix.c -o fix.o
 *     sudo asap patch --pid 1234 --function f fix.o      # fix.o defines f
 *     sudo asap patch --pid 1234 fix.o                   # fix.o says itself what it replaces (below)
 *
 * Write only what changes. Functions and global variables of the target are used by declaring them (include the
 * program's own headers); static ones by ASAP_IMPORT. What a patch defines is new: its own variables start afresh when it is
 * applied, and a copy of a static variable of the target is another variable than the target's.
 *
 * A guard around a function that stays:
 *
 *     #include <asap-patch.h>
 *     #include "server.h"
 *
 *     ASAP_REPLACE(parse_header);
 *     int parse_header(struct request *r, const char *line)
 *     {
 *         if (strlen(line) > 8192)
 *             return HTTP_BAD_REQUEST;
 *         return ASAP_ORIGINAL(parse_header)(r, line);
 *     }
 *
 * A static function, a static variable, a static helper:
 *
 *     extern int limit;                ASAP_IMPORT(limit, "parser.c:limit");
 *     int next_token(struct parser *); ASAP_IMPORT(next_token, "parser.c:next_token");
 *     int old_parse(struct parser *);  ASAP_ORIGINAL_NAMED(old_parse, "parser.c:parse");
 *
 *     ASAP_REPLACES("parser.c:parse")
 *     int new_parse(struct parser *p)
 *     {
 *         return next_token(p) > limit ? -1 : old_parse(p);
 *     }
 *
 * Names are written as `asap inspect` prints them: "function", or "file.c:function" where several static functions
 * share a name. C++ names may be mangled or as the source has them.
 *
 * A patch can't have: new thread-local variables, constructors of static objects, IFUNCs. asap says so when it meets one.
 *
 * Needs the GNU dialects (-std=gnu11, gnu++17: the defaults of gcc and clang).
 */
#ifndef ASAP_PATCH_H
#define ASAP_PATCH_H

#if !defined(__GNUC__)
#error "asap-patch.h needs gcc or clang"
#endif
#if !defined(__x86_64__) || defined(__ILP32__)
#error "asap patches programs of 64-bit x86 only"
#endif

/* A declaration is two pointers in a section of its own, which asap reads from the object file and leaves out of the
 * program. */
struct asap_declaration_ {
    const void *subject;
    const void *name;
};
struct asap_pre_hook_ {
    int (*subject)(void);
    const void *name;
};
struct asap_post_hook_ {
    void (*subject)(void);
    const void *name;
};

#define ASAP_JOIN_(a, b) a##b
#define ASAP_UNIQUE_(n) ASAP_JOIN_(asap_declaration_, n)
#define ASAP_RECORD_(type, kind, subject, name)                                      \
    static struct type ASAP_UNIQUE_(__COUNTER__)                                     \
        __attribute__((used, aligned(8), section(".asap." kind))) = {subject, name}

/* ASAP_REPLACE(f): the function f of this file replaces the target's function f. At file scope, with a semicolon; f must be
 * declared before. */
#define ASAP_REPLACE(f) ASAP_RECORD_(asap_declaration_, "replace", (const void *)&f, 0)

/* ASAP_REPLACE_NAMED(f, "file.c:g"): the function f of this file replaces the target's static function g of file.c. */
#define ASAP_REPLACE_NAMED(f, name) ASAP_RECORD_(asap_declaration_, "replace", (const void *)&f, name)

/* ASAP_REPLACES("file.c:g") in front of a function's definition: the same, written as an attribute. The name must not
 * contain blanks, commas, quotes or parentheses; where it does (C++), use ASAP_REPLACE_NAMED. */
#if defined(__clang__)
#define ASAP_REPLACES(name) __attribute__((used, noinline, section(".text.asap.replaces:" name)))
#else
#define ASAP_REPLACES(name) __attribute__((used, noinline, noclone, section(".text.asap.replaces:" name)))
#endif

/* ASAP_ORIGINAL(f): the function f as it was before this patch (with older patches of it, if there are any). Call it:
 *
 *     return ASAP_ORIGINAL(f)(x, y);
 *
 * f is a plain, unqualified function name; for a replacement under another name, either name does. In C++, f must not be
 * overloaded, and it can't be used in templates and inline functions: use ASAP_ORIGINAL_NAMED there, and for member functions.
 * asap refuses the patch when the beginning of f can't be moved faithfully, and says why. */
#if defined(__cplusplus)
#define ASAP_ORIGINAL(f)                                                             \
    __extension__({                                                                  \
        extern __typeof__(f) asap_original_##f __asm__("asap.original." #f);         \
        ASAP_RECORD_(asap_declaration_, "original_of", (const void *)&asap_original_##f, (const void *)&f); \
        &asap_original_##f;                                                          \
    })
#else
#define ASAP_ORIGINAL(f)                                                             \
    __extension__({                                                                  \
        extern __typeof__(f) asap_original_##f __asm__("asap.original." #f);         \
        &asap_original_##f;                                                          \
    })
#endif

/* ASAP_ORIGINAL_NAMED(g, "file.c:f"): the name g, declared in this patch and not defined, stands for the original of the target's
 * function f of file.c, which this patch replaces. */
#define ASAP_ORIGINAL_NAMED(g, name) ASAP_RECORD_(asap_declaration_, "original", (const void *)&g, name)

/* ASAP_IMPORT(n, "file.c:m"): the name n, declared extern in this patch and not defined, stands for the target's function
 * or variable m of file.c. Thread-local variables can't be imported this way, only by their global name. */
#define ASAP_IMPORT(n, name) ASAP_RECORD_(asap_declaration_, "import", (const void *)&n, name)

/* Hooks: functions of the patch that run in the target, once per process, while no thread is inside the functions to be
 * replaced:
 *
 *     static int check(void) { return global_table_version == 3 ? 0 : 1; }
 *     ASAP_PRE_APPLY(check);
 *
 * pre_apply  int f(void), before the new code is installed.     Other than 0: the patch is refused, nothing has changed.
 * post_apply void f(void), after the new code was installed.
 * pre_revert int f(void), before the old code is put back.      Other than 0: the patch stays.
 * post_revert void f(void), after the old code was put back.
 *
 * With several hooks of one kind, their order is not defined.
 *
 * A hook borrows a thread of the target, stopped at an arbitrary instruction: its stack, its thread-local variables (errno!), its
 * pthread_self. Other threads may be waiting, and may hold any lock. So a hook may read and write memory, call functions that
 * do just that, and make system calls that do not wait; it must return soon. It must not take locks, allocate
 * (malloc, new, printf), throw, longjmp, or wait for another thread. */
#define ASAP_PRE_APPLY(f) ASAP_RECORD_(asap_pre_hook_, "pre_apply", &f, 0)
#define ASAP_POST_APPLY(f) ASAP_RECORD_(asap_post_hook_, "post_apply", &f, 0)
#define ASAP_PRE_REVERT(f) ASAP_RECORD_(asap_pre_hook_, "pre_revert", &f, 0)
#define ASAP_POST_REVERT(f) ASAP_RECORD_(asap_post_hook_, "post_revert", &f, 0)

#endif
