# needs: /usr/bin/gcc (gcc)
# The driver, and the compiler proper by itself.
cat > in.c <<'END'
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
struct node { struct node *next; int value; };
static int compare(const void *a, const void *b) { return *(int *)a - *(int *)b; }
int main(void) {
    int values[100]; struct node *list = NULL;
    for (int i = 0; i < 100; i++) { values[i] = i * 37 % 101; struct node *n = malloc(sizeof *n); n->value = i; n->next = list; list = n; }
    qsort(values, 100, sizeof *values, compare);
    long sum = 0; for (struct node *n = list; n; n = n->next) sum += n->value * values[n->value];
    printf("%ld\n", sum); return (int)(sum % 100);
}
END
$RUN gcc -O2 -Wall -o out in.c && ./out || echo "ended with $?"
gcc -E in.c -o in.i
$RUN "$(gcc -print-prog-name=cc1)" -quiet -fpreprocessed -O3 in.i -o in.s && cksum < in.s
$RUN as in.s -o in.o && $RUN ld -r in.o -o all.o && cksum < all.o
$RUN objdump -d in.o | tail -n +4 | cksum
echo 'int main(void) { return x; }' | $RUN "$(gcc -print-prog-name=cc1)" -quiet - -o /dev/null 2> /dev/null || echo "wrong: $?"
