"""Memory: frames, page tables, VMAs, address spaces, user memory access, ELF loading.

Theory in one paragraph. A sandbox has one `FrameAllocator` over guest RAM. A process has one `AddressSpace`: a sorted
list of VMAs (what the application asked for) over one Mmu (what the processor sees). A page-table entry is also our
book of who owns the page: the software bits OWNED (a frame of ours, counted in the allocator), COW (that frame may be
shared with a fork's other half) and their absence (the page belongs to a Backing). Removing or narrowing entries is
recorded in the Mmu and made to hold by one `flush()`; frames leave for the allocator only after it.
"""
