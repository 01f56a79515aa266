# needs: /usr/lib/python3.11/test/regrtest.py (libpython3.11-testsuite)
# slow
# The core part of Python's own tests. Times are left out of what it says.
export PYTHONDONTWRITEBYTECODE=1
$RUN /usr/bin/python3 -m test -q test_grammar test_builtin test_int test_float test_complex test_list test_dict test_set test_tuple \
    test_unicode test_bytes test_exceptions test_generators test_coroutines test_class test_descr test_iter test_scope test_re \
    test_json test_struct test_math test_itertools test_functools test_sort test_slice test_with test_raise test_traceback \
    test_weakref test_thread test_threading test_signal test_fork1 test_zlib test_hashlib test_array test_heapq test_random \
    > said 2>&1 || echo "ended with $?"
grep -E '^(Result|Tests result|All [0-9]+ tests|[0-9]+ test)' said | sed 's/ in .*//'
