// stream.cpp - the driver API: streams and events.
#include <chrono>

#include "driver.h"

using namespace drv;

static std::map<void*, std::unique_ptr<Event>> events;

static double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
static Event* event_of(void* h) {
  auto it = events.find(h);
  return it == events.end() ? nullptr : it->second.get();
}

// --- streams
API cuStreamCreate(void** h, u32 flags) {
  LOCK;
  if (!current_context()) return INVALID_CONTEXT;
  auto s = std::make_shared<Stream>();
  s->flags = flags;
  *h = s.get();
  streams[*h] = s;
  return OK;
}
API cuStreamCreateWithPriority(void** h, u32 flags, int) { return cuStreamCreate(h, flags); }
API cuStreamDestroy_v2(void* h) {
  LOCK;
  auto s = stream_of(h);
  if (!s || s->null) return INVALID_HANDLE;
  run_until(*s, ~0ull);
  streams.erase(h);
  return OK;
}
API cuStreamGetPriority(void*, int* p) {
  *p = 0;
  return OK;
}
API cuStreamSynchronize(void* h) {
  LOCK;
  if (!current_context()) return INVALID_CONTEXT;
  auto s = stream_of(h);
  if (!s) return INVALID_HANDLE;
  if (s->cap) return invalidate(*s->cap, CAPTURE_UNSUPPORTED, "cuStreamSynchronize of a capturing stream");
  return run_until(*s, s->issued);
}
API cuStreamQuery(void* h) {  // a host that polls makes progress, and sees "not ready" while something is left
  LOCK;
  auto s = stream_of(h);
  if (!s) return INVALID_HANDLE;
  if (s->cap) return invalidate(*s->cap, CAPTURE_UNSUPPORTED, "cuStreamQuery of a capturing stream");
  poll(*s);
  if (int e = s->error(this_thread())) return e;
  return s->done == s->issued ? OK : NOT_READY;
}

// --- events
constexpr unsigned DISABLE_TIMING = 2;
API cuEventCreate(void** h, u32 flags) {
  LOCK;
  if (!current_context()) return INVALID_CONTEXT;
  auto e = std::make_unique<Event>();
  e->flags = flags;
  *h = e.get();
  events[*h] = std::move(e);
  return OK;
}
API cuEventDestroy_v2(void* h) {
  LOCK;
  return events.erase(h) ? OK : INVALID_HANDLE;
}
API cuEventRecord(void* h, void* stream) {
  LOCK;
  if (!current_context()) return INVALID_CONTEXT;
  Event* e = event_of(h);
  auto s = stream_of(stream);
  if (!e || !s) return INVALID_HANDLE;
  if (s->cap) {
    e->cap = s->cap;
    e->tail = s->tail;
    return s->cap->invalid ? CAPTURE_INVALIDATED : OK;
  }
  auto m = std::make_shared<Mark>();
  e->cap = nullptr;
  e->s = s;
  e->mark = m;
  int r = enqueue(stream, EMPTY, [m] {
    m->done = true;
    m->ms = now_ms();
    return 0;
  });
  e->at = s->issued;
  return r;
}
API cuEventRecordWithFlags(void* h, void* stream, u32) { return cuEventRecord(h, stream); }
API cuEventSynchronize(void* h) {
  LOCK;
  Event* e = event_of(h);
  if (!e) return INVALID_HANDLE;
  if (e->cap) return CAPTURED_EVENT;
  auto s = e->s;
  return s ? run_until(*s, e->at) : OK;
}
API cuEventQuery(void* h) {  // as cuStreamQuery
  LOCK;
  Event* e = event_of(h);
  if (!e) return INVALID_HANDLE;
  if (e->cap) return CAPTURED_EVENT;
  auto s = e->s;
  auto mark = e->mark;
  if (!s || mark->done) return OK;
  poll(*s);
  if (int r = s->error(this_thread())) return r;
  return mark->done ? OK : NOT_READY;
}
API cuEventElapsedTime_v2(float* ms, void* a, void* b) {
  LOCK;
  Event *x = event_of(a), *y = event_of(b);
  if (!x || !y || !x->mark || !y->mark || (x->flags | y->flags) & DISABLE_TIMING) return INVALID_HANDLE;
  if (!x->mark->done || !y->mark->done) return NOT_READY;
  *ms = (float)(y->mark->ms - x->mark->ms);
  return OK;
}
API cuEventElapsedTime(float* ms, void* a, void* b) { return cuEventElapsedTime_v2(ms, a, b); }
API cuStreamWaitEvent(void* stream, void* h, u32) {
  LOCK;
  if (!current_context()) return INVALID_CONTEXT;
  Event* e = event_of(h);
  auto s = stream_of(stream);
  if (!e || !s) return INVALID_HANDLE;
  if (e->cap) {  // a fork: the waiting stream joins the capture
    if (e->cap->ended) return CAPTURED_EVENT;
    if (s->cap && s->cap != e->cap) return invalidate(*s->cap, CAPTURE_MERGE, "events of two captures");
    if (!s->cap) {
      s->cap = e->cap;
      s->cap->streams.push_back(s.get());
    }
    s->tail.insert(e->tail.begin(), e->tail.end());
    return OK;
  }
  if (s->cap) {
    if (!e->mark) return OK;
    return invalidate(*s->cap, CAPTURE_ISOLATION, "a wait for an event recorded before the capture");
  }
  if (!e->s || e->mark->done) return OK;
  auto o = e->s;
  uint64_t at = e->at;
  return enqueue(stream, EMPTY, [=] {
    run_until(*o, at);
    return 0;
  });
}
