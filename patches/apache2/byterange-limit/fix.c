/* A guard for the class of CVE-2011-3192: a request for very many ranges of a file makes the server build an answer of very
 * many parts. Requests for more than 20 ranges get the whole file instead, as the advisory's workaround did; all others go
 * to the original. */
#include "asap-patch.h"

#include <httpd.h>
#include <http_core.h>
#include <http_protocol.h>

#define MOST_RANGES 20

AP_CORE_DECLARE_NONSTD(apr_status_t) ap_byterange_filter(ap_filter_t *f, apr_bucket_brigade *bb)
{
    static const char *const names[] = { "Range", "Request-Range" };
    for (int i = 0; i < 2; i++) {
        const char *list = apr_table_get(f->r->headers_in, names[i]);
        int ranges = 1;
        for (const char *c = list; c && *c; c++)
            ranges += *c == ',';
        if (list && ranges > MOST_RANGES)
            apr_table_unset(f->r->headers_in, names[i]);
    }
    return ASAP_ORIGINAL(ap_byterange_filter)(f, bb);
}
