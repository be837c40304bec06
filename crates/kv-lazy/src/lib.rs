//! KV caches that evict: LazyEviction and the policies it is compared with.
