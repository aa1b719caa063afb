//! Threads that compute an op together.
//!
//! A step of a small model is some 200 ops of microseconds each. So a thread that has finished looks for the next op
//! for [`AWAKE`] before it sleeps, and one store is enough to publish an op. It is in this folder because the work
//! borrows from its caller, which needs `unsafe`.

use std::{
    any::Any,
    cell::UnsafeCell,
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How long an idle thread looks for work before it sleeps: longer than the host takes between two ops or two steps.
pub const AWAKE: Duration = Duration::from_micros(100);

/// Threads; the caller of an op is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    /// Whoever holds this lock may use the threads.
    caller: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    /// `serial << 32 | workers inside`; the serial is odd while an op is open for workers.
    state: AtomicU64,
    /// Set before the serial becomes odd; read by workers that are inside an op.
    work: UnsafeCell<Option<Work>>,
    /// The next part that nobody has taken.
    next: AtomicUsize,
    sleepers: AtomicUsize,
    ended: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// An op: `f(0)`, ..., `f(parts - 1)`, in any order.
#[derive(Clone, Copy)]
struct Work {
    f: *const (dyn Fn(usize) + Sync),
    parts: usize,
}

// SAFETY: `work` is written by the caller alone, while the serial is even and nobody is inside, and its closure is Sync.
unsafe impl Sync for Shared {}
// SAFETY: the same.
unsafe impl Send for Shared {}

impl Shared {
    /// Takes parts until there are none.
    fn help(&self, work: Work) {
        loop {
            let part = self.next.fetch_add(1, SeqCst);
            if part >= work.parts {
                return;
            }
            // SAFETY: the caller of the op does not return, and so its closure lives, while somebody is inside.
            let f = unsafe { &*work.f };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| f(part))) {
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
            }
        }
    }

    /// What a worker does, from beginning to end.
    fn live(&self) {
        let mut seen = 0;
        while let Some(serial) = self.wait(seen) {
            seen = serial;
            let entered = self.state.fetch_update(SeqCst, SeqCst, |s| (s >> 32 == serial).then_some(s + 1));
            if entered.is_ok() {
                // SAFETY: it was written before the serial became this, and is not written while this thread is inside.
                if let Some(work) = unsafe { *self.work.get() } {
                    self.help(work);
                }
                self.state.fetch_sub(1, SeqCst);
            }
        }
    }

    /// The serial of an open op other than `seen`, or none at the end.
    fn wait(&self, seen: u64) -> Option<u64> {
        let open = || Some(self.state.load(SeqCst) >> 32).filter(|s| s % 2 == 1 && *s != seen);
        let mut since = Instant::now();
        loop {
            for _ in 0..64 {
                if let Some(serial) = open() {
                    return Some(serial);
                }
                std::hint::spin_loop();
            }
            if self.ended.load(SeqCst) {
                return None;
            }
            if since.elapsed() > AWAKE {
                self.sleepers.fetch_add(1, SeqCst); // before it looks again, and who opens an op looks at it after that
                while open().is_none() && !self.ended.load(SeqCst) {
                    thread::park();
                }
                self.sleepers.fetch_sub(1, SeqCst);
                since = Instant::now();
            }
        }
    }
}

impl Pool {
    /// This many threads, including the caller.
    pub fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared::default());
        let worker = |i| {
            let shared = shared.clone();
            thread::Builder::new().name(format!("aoji-{i}")).spawn(move || shared.live())
        };
        // where the system gives no more threads, there are fewer
        let workers = (1..threads).map_while(|i| worker(i).ok()).collect();
        Pool { shared, caller: Mutex::new(()), workers }
    }

    /// The process's, of one thread a physical core.
    pub fn global() -> &'static Arc<Pool> {
        static POOL: OnceLock<Arc<Pool>> = OnceLock::new();
        POOL.get_or_init(|| {
            let logical = thread::available_parallelism().map_or(1, usize::from);
            Arc::new(Pool::new(logical.min(num_cpus::get_physical())))
        })
    }

    /// Threads, with the caller.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    fn wake(&self) {
        if self.shared.sleepers.load(SeqCst) > 0 {
            self.workers.iter().for_each(|worker| worker.thread().unpark());
        }
    }

    /// Calls `f(0)`, ..., `f(parts - 1)`, each once, on whatever threads are free. While another op uses them, the
    /// caller works alone.
    pub fn run(&self, parts: usize, f: &(dyn Fn(usize) + Sync)) {
        let caller = if parts > 1 && !self.workers.is_empty() { self.caller.try_lock().ok() } else { None };
        let Some(caller) = caller else { return (0..parts).for_each(f) };
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; this function returns when nobody is inside any more, who alone uses it.
        let f: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(f) };
        let work = Work { f, parts };
        // SAFETY: the serial is even and nobody is inside: the last op ended so. `caller` is held: nobody else is here.
        unsafe { *shared.work.get() = Some(work) };
        shared.next.store(0, SeqCst);
        shared.state.fetch_add(1 << 32, SeqCst);
        self.wake();
        shared.help(work);
        let mut state = shared.state.fetch_add(1 << 32, SeqCst);
        let mut rounds = 0u32;
        while state as u32 > 0 {
            rounds += 1;
            if rounds > 2000 {
                thread::yield_now(); // a worker's core may be somebody else's
            }
            std::hint::spin_loop();
            state = shared.state.load(SeqCst);
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(caller); // first: unwinding with it would poison it, and nobody would have the threads again
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Calls `f(r, c, tile)` for each tile of `height` rows and `width` columns of a matrix [rows, cols], where the
    /// tile begins at row `r` and column `c`; tiles at the edges are smaller.
    ///
    /// # Panics
    /// If `out` is smaller than the matrix.
    pub fn tiles<T: Send + Sync>(
        &self,
        out: &mut [T],
        [rows, cols]: [usize; 2],
        [height, width]: [usize; 2],
        f: impl Fn(usize, usize, Tile<'_, T>) + Sync,
    ) {
        assert!(out.len() >= rows * cols && height > 0 && width > 0, "{} elements, {rows} x {cols}", out.len());
        let (first, down) = (Ptr(out.as_mut_ptr()), rows.div_ceil(height));
        self.run(down * cols.div_ceil(width), &|part| {
            let (r, c) = (part % down * height, part / down * width);
            let (rows, width) = (height.min(rows - r), width.min(cols - c));
            // SAFETY: row r is below rows, column c below cols.
            let first = unsafe { first.at(r * cols + c) };
            f(r, c, Tile { first, rows, width, stride: cols, matrix: PhantomData });
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.ended.store(true, SeqCst);
        self.wake();
        for worker in self.workers.drain(..) {
            drop(worker.join()); // a worker's panic was given to its caller
        }
    }
}

/// Where a matrix begins.
struct Ptr<T>(*mut T);
// SAFETY: it is only turned into tiles, which do not overlap.
unsafe impl<T: Send> Sync for Ptr<T> {}

impl<T> Ptr<T> {
    /// # Safety
    /// The matrix has the element.
    unsafe fn at(&self, i: usize) -> *mut T {
        // SAFETY: the contract of this function.
        unsafe { self.0.add(i) }
    }
}

/// A part of a matrix that is one thread's: no other has any of its elements.
pub struct Tile<'a, T> {
    first: *mut T,
    rows: usize,
    width: usize,
    stride: usize,
    matrix: PhantomData<&'a mut [T]>,
}

impl<T> Tile<'_, T> {
    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The columns of a row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&mut self, r: usize) -> &mut [T] {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        // SAFETY: the row is one of the tile's, which no other tile has; it is borrowed as long as the tile is.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(r * self.stride), self.width) }
    }
}
